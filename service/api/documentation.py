"""The API's own page, at `/docs` and `/openapi.json`: whole, and offline."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import HTMLResponse, Response

from service.api.admin.router import BODIES
from service.api.dialects import DIALECTS
from service.api.images import CleanImageRequest
from service.api.inquiry import shapes as inquiry_shapes
from service.api.moderations import ModerationRequest
from service.api.schemas import SessionRequest


def document(app: FastAPI) -> None:
    """The OpenAPI page, whole and offline: Swagger UI's files come from a package, not from a CDN."""
    static = files("fastapi_offline") / "static"

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            components = schema.setdefault("components", {})
            shapes = components.setdefault("schemas", {})
            # Their bodies are read by ourselves, so the framework does not know them.
            bodies: list[type[BaseModel]] = [dialect.request for dialect in DIALECTS]
            bodies += [ModerationRequest, SessionRequest, CleanImageRequest, *BODIES, *inquiry_shapes.BODIES]
            for model in bodies:
                shape = model.model_json_schema(ref_template="#/components/schemas/{model}")
                shapes |= shape.pop("$defs", {}) | {model.__name__: shape}
            components["securitySchemes"] = {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "prc_live_…, prc_admin_…, or a JWT",
                }
            }
            schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Pericarp API",
            swagger_js_url="/docs/swagger-ui.js",
            swagger_css_url="/docs/swagger-ui.css",
            swagger_favicon_url="data:,",
        )

    @app.get("/docs/swagger-ui.js", include_in_schema=False)
    async def show_script() -> Response:
        return Response((static / "swagger-ui-bundle.js").read_bytes(), media_type="text/javascript")

    @app.get("/docs/swagger-ui.css", include_in_schema=False)
    async def show_style() -> Response:
        return Response((static / "swagger-ui.css").read_bytes(), media_type="text/css")
