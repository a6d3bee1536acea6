"""The playground: a page that uses nothing but the public API. Static files only; `gateway.http.playground` serves
them."""
