"""Adds the files of a project that are no modules to the package: pyproject.toml cannot name files outside of one."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DATA = ("params.yaml", "dvc.yaml", "requirements-packaged.txt", ".dvc/plots/curves.json", "presets/*.yaml")


class BuildWithProject(build_py):
    """Copies the files to prefixquant/project/, where `prefixquant/package_data.py` finds them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # there they are found in the source tree
            return
        for path in (path for pattern in DATA for path in sorted(ROOT.glob(pattern))):
            target = Path(self.build_lib, "prefixquant", "project", path.relative_to(ROOT))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithProject})
