"""Stand-in for a machine without this project: a program that runs others where it cannot be imported."""

#: Runs a program as it stands, where nothing of this project and of its dependencies can be imported.
ALONE = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "seq2seq", "kernels", "bench", "pandas", "scipy", "onnx"}:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
