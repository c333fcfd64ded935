"""Other ways to write the one-launch loss kernel, to be measured against it: `python -m benchmarks.experiments --help`.

Read in this order: `common` (the job they all do, and what they share), `present` (the package's kernel), `hints`
(its two passes, with and without eviction hints), `interleaved`, `counter` and `cluster` (the candidates), `candidates`
(all of them, with the launch parameters that are tried), `compiled` (what the compiler makes of them, without a GPU),
`measured` (checked against float64 and timed, on one).
"""
