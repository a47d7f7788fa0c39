import os
import sys
from pathlib import Path
from subprocess import check_call
spots = (Path("."), Path(".."), Path("prefbook"))
if not (root := next((p for p in spots if (p / "lib/chapter.py").is_file()), None)):
    root = spots[-1]  # on Colab: clone; pip then keeps Colab's own numpy, pandas and torch
    check_call(["git", "clone", "--depth=1", "{repository_url}", root])
    check_call([sys.executable, "-m", "pip", "install", "--quiet", f"./{root}[llm]"])
os.chdir(root)
