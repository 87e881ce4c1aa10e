"""The configurations that come with Quorum; a package, so that they travel in the wheel."""
