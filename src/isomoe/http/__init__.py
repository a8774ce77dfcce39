"""A client of HTTP servers, for what measures and compares them."""

from isomoe.http.client import HttpClient, Sink
from isomoe.http.response import Response, ResponseError, ResponseReader
from isomoe.http.url import Url

__all__ = ["HttpClient", "Response", "ResponseError", "ResponseReader", "Sink", "Url"]
