"""A run or an exported model behind a small page and a JSON API (extra `serve`: starlette and uvicorn)."""
