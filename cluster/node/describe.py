"""Writes env.json: runs in the job's own Python (any 3.8 or newer), which has nothing of ours, so it stands alone.

    python -c SOURCE env.json '{"hostname": …}'
    python -c SOURCE                              prints what must be the same on all nodes of a job
"""
import importlib.metadata
import importlib.util
import json
import os
import platform
import runpy
import sys


def torch_facts(installed):
    """torch's version and CUDA, without loading torch."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return {"torch": None, "cuda": None, "nccl": None}
    said = runpy.run_path(os.path.join(os.path.dirname(found.origin), "version.py"))
    return {"torch": said.get("__version__"), "cuda": said.get("cuda"), "nccl": nccl_version(installed)}


def nccl_version(installed):
    """Of the package beside torch; None where torch has it built in: then torch's own version says it."""
    return next((version for name, version in installed if (name or "").startswith("nvidia-nccl-")), None)


def packages():
    """[(name, version)]. Each look at `metadata` or `version` reads and parses a file: one for each package."""
    found = (one.metadata for one in importlib.metadata.distributions())
    return [(one["Name"], one["Version"]) for one in found]


def alike(installed):
    return {"python": platform.python_version(), **torch_facts(installed)}


def main(path, facts):
    os.nice(19)
    installed = packages()
    facts = {**facts, **alike(installed), "executable": sys.executable, "prefix": sys.prefix,
             "packages": {str(name): version for name, version in sorted(installed, key=str)}}
    aside = "%s.%d" % (path, os.getpid())
    with open(aside, "w") as file:
        json.dump(facts, file, indent=1)
    os.replace(aside, path)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1], json.loads(sys.argv[2]))
    else:
        print(json.dumps(alike(packages())))
