"""How fast is flask-websockets? Its messages per second as a share of raw ASGI's."""
