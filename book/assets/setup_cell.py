import os
import sys
from importlib import metadata, util
from pathlib import Path
from subprocess import check_call
spots = (Path("."), Path(".."), Path("prefbook"))
if not (root := next((p for p in spots if (p / "lib/chapter.py").is_file()), None)):
    url = "{repository_url}" or sys.exit("start in a checkout of the book, or papermill --cwd ROOT")
    check_call(["git", "clone", "--depth=1", url, root := spots[-1]])
if root == spots[-1] and not all(map(util.find_spec, ("myst_nb", "trl"))):  # on Colab
    check_call([sys.executable, "-m", "pip", "install", "--quiet", f"./{root}[llm]"])
if (old := sys.modules.get("pyarrow")) and old.__version__ != metadata.version("pyarrow"):
    raise SystemExit("Runtime > Restart session, then run again")
os.chdir(root)
