"""Writes env.json: runs in the job's own Python (any 3.8 or newer), which has nothing of ours, so it stands alone.

    python -c SOURCE env.json '{"hostname": …}'
"""
import importlib.metadata
import importlib.util
import json
import os
import platform
import runpy
import sys


def torch_facts():
    """torch's version and CUDA, without loading torch."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return {"torch": None, "cuda": None}
    said = runpy.run_path(os.path.join(os.path.dirname(found.origin), "version.py"))
    return {"torch": said.get("__version__"), "cuda": said.get("cuda")}


def packages():
    found = ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
    return {str(name): version for name, version in sorted(found, key=str)}


def main(path, facts):
    os.nice(19)
    facts = {**facts, "python": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix,
             **torch_facts(), "packages": packages()}
    aside = "%s.%d" % (path, os.getpid())
    with open(aside, "w") as file:
        json.dump(facts, file, indent=1)
    os.replace(aside, path)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
