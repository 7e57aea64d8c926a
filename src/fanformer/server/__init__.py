"""Models behind HTTP: requests that share steps, the OpenAI wire, limits."""
