"""One file per host: the losses where its own are. Each imports its host, and nothing here is imported by default."""
