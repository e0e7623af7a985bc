"""The server: models behind OpenAI's chat completions, with a media gate and limits on everything."""
