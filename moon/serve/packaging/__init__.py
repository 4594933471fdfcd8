"""What a bundle needs to run elsewhere: a container's recipe, manifests, a bento."""

from moon.serve.packaging.package import package

__all__ = ["package"]
