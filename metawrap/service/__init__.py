"""A web page and an API on a classifier, or on a learner that fits classifiers to photos: `metawrap serve`.

app.py: `create_app`: the paths, the classifiers in memory, and what is said of an error
uploads.py: requests -> bytes and photos, in memory alone, within `Limits`
"""

from metawrap.errors import MetaWrapError

try:
    from metawrap.service.app import Adapter, create_app
    from metawrap.service.uploads import Limits
except ImportError as error:
    raise MetaWrapError(
        'metawrap serve needs fastapi, uvicorn and python-multipart: pip install "metawrap[serve]".'
    ) from error

__all__ = ["Adapter", "Limits", "create_app"]
