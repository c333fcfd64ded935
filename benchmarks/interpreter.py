"""Triton's interpreter, made quicker: what it computes stays as it is.

It replaces the functions of triton.language on every call of a device function, although they stay replaced until
the launch ends: more than half of the time of a small launch. Here it does so once per launch and module.
"""

import functools
import inspect
import os


@functools.cache
def hasten() -> None:
    """Once per process; does nothing where kernels are not interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ModuleNotFoundError:  # no Triton, nothing to hasten
        return

    language = interpreter.tl
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()
    nothing = getattr(interpreter, "_LangPatchScope", lambda: None)

    @functools.cache
    def modules(fn) -> frozenset[str]:
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module.__name__ for module in seen if module in (language, language.core))

    def replace_once(fn):
        if modules(fn) <= replaced:
            return nothing()
        replaced.update(modules(fn))
        return replace(fn)

    @functools.wraps(launch)
    def launch_afresh(self, *args, **kwargs):
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_afresh
