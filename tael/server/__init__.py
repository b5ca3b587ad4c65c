"""The HTTP server: OpenAI and Anthropic dialects over an engine in a process of its own."""
