"""Names for people."""

import re

_ENGINE = re.compile(r"^([a-z]+?)(\d*)_(\d+)b_([a-z]+\d+\w*)$")


def engine_name(engine: str) -> str:
    """`vicuna_7b_a100` as `Vicuna-7B · A100`; a name of another form as it is."""
    found = _ENGINE.match(engine)
    if found is None:
        return engine
    model, version, size, gpu = found.groups()
    return f"{model.capitalize()}{'-' + version if version else ''}-{size}B · {gpu.upper()}"
