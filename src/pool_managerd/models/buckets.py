"""Models in buckets (S3 and what speaks like it): where they are, and addresses that are signed for one who may read them.

The variables of the environment are those of other programs. What signs is the library of the extra ``s3``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote

from yarl import URL

from pool_managerd.errors import NodeError, SpecError
from pool_managerd.models.refs import ModelRef

if TYPE_CHECKING:
    from obstore.store import S3Config

_SIGNED_FOR = timedelta(hours=1)
_LOGINS = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_METADATA_ENDPOINT",
)  # fmt: skip
"""One of them says that there is somebody to sign for; without, buckets are read that are open to everybody."""


@dataclass(frozen=True, slots=True)
class BucketAccess:
    """``endpoint`` is None for Amazon's own; ``signs``: there is somebody to sign for."""

    endpoint: URL | None = None
    region: str = "us-east-1"
    signs: bool = False
    _entered: dict[URL, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, env: Mapping[str, str]) -> BucketAccess:
        """Raises SpecError CONFIG_ERROR for an address that is none."""
        said = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
        signs = any(env.get(name) for name in _LOGINS) and env.get("AWS_SKIP_SIGNATURE", "").lower() not in ("1", "true")
        return cls(None if not said else _endpoint(said), region, signs)

    def address(self, model: ModelRef) -> URL:
        """Of an object, unsigned. Raises SpecError."""
        bucket, _, key = model.location.removeprefix("s3://").partition("/")
        if any(part in (".", "..") for part in key.split("/")):
            raise SpecError(f"cannot fetch {model.id}: its key has a part `.` or `..`, which would lead elsewhere")
        if self.endpoint is not None:
            base = f"{self.endpoint}/{bucket}"
        elif "." in bucket:  # no certificate is for that as a part of a host's name
            base = f"https://s3.{self.region}.amazonaws.com/{bucket}"
        else:
            base = f"https://{bucket}.s3.{self.region}.amazonaws.com"
        url = URL(f"{base}/{quote(key)}", encoded=True)
        self._entered[url] = bucket, key
        return url

    async def opened(self, url: URL) -> URL:
        """``url`` as it may be read: signed, where it is of a bucket and there is somebody to sign for. Raises NodeError."""
        found = self._entered.get(url)
        if found is None or not self.signs:
            return url
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError:
            raise NodeError(
                f"cannot fetch {url}: there are credentials for buckets, and what signs with them is not installed",
                hint="pip install 'pool-managerd[s3]', or set AWS_SKIP_SIGNATURE=true for a bucket that is open", retriable=False,
            ) from None  # fmt: skip
        bucket, key = found
        where: S3Config = {"region": self.region, "virtual_hosted_style_request": self.endpoint is None and "." not in bucket}
        if self.endpoint is not None:
            where["endpoint"] = str(self.endpoint)
        try:
            store = S3Store(bucket, config=where, client_options={"allow_http": True})
            signed = await obstore.sign_async(store, "GET", key, expires_in=_SIGNED_FOR)
        except (BaseError, ValueError) as problem:
            why = str(problem).partition("\n")[0]
            raise NodeError(
                f"cannot fetch {url}: it cannot be signed: {why}", hint="see the AWS_ variables of the daemon"
            ) from None
        return url.with_query(URL(signed).query)

    def hint(self, url: URL) -> str | None:
        """What to do where ``url`` is refused; None: it is of no bucket."""
        if url not in self._entered:
            return None
        if self.signs:
            return "see whether the credentials of the daemon (AWS_ACCESS_KEY_ID …) may read it, and AWS_REGION"
        return "it is not open to everybody: give the daemon credentials (AWS_ACCESS_KEY_ID …) and the extra `s3`"


def _endpoint(said: str) -> URL:
    try:
        url = URL(said.rstrip("/"))
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host or url.user or url.query_string:
        raise SpecError("cannot use AWS_ENDPOINT_URL: it is no address such as https://minio.internal:9000", code="CONFIG_ERROR")
    return url
