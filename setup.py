"""Packaging shim: every value comes from settings.ini. A wheel also carries the data, the recipes and the notebooks."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

LEFT_OUT = shutil.ignore_patterns(".*", "*.lock", "cache", "export", "runs")


class BuildWithFolders(build_py):
    "What lies beside the package in a clone lies within it once installed; `common.package_folder` finds both."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        shipped = Path(self.build_lib, cfg["lib_path"], "shipped")
        shutil.rmtree(shipped, ignore_errors=True)
        for folder in ("data", "recipes", "nbs"):
            shutil.copytree(here / folder, shipped / folder, ignore=LEFT_OUT)


setup(
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=["Programming Language :: Python :: 3"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "docs", "share")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    cmdclass={"build_py": BuildWithFolders},
)
