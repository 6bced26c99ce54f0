"""The version of this project: in the package's metadata, CITATION.cff and CHANGELOG.md."""

VERSION = "0.2.0"
