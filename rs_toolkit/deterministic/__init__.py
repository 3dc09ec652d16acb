from .. import lazily

__getattr__, __dir__ = lazily(__name__, __path__)
