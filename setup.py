"""Package `diffclip_da` as `settings.ini` describes it; the notebooks in `nbs/` are the source of the code."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], license="Apache-2.0",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["diffclip_da", "diffclip_da.*"]), include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "book": cfg["book_requirements"].split(), "heif": ["pillow-heif>=0.16"]},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
