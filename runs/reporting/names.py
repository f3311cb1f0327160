"""Names for people."""

import re

_ENGINE = re.compile(r"^([a-z]+?)(\d*)_(\d+)b_([a-z]+\d+\w*)$")


def engine_name(engine: str) -> str:
    """`vicuna_7b_a100` as `Vicuna-7B · A100`, what follows behind a comma; a name of another form as it is."""
    name, _, variant = engine.partition(" ")
    found = _ENGINE.match(name)
    if found is None:
        return engine
    model, version, size, gpu = found.groups()
    return f"{model.capitalize()}{'-' + version if version else ''}-{size}B · {gpu.upper()}" + (
        f", {variant}" if variant else ""
    )
