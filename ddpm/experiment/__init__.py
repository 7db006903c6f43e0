"""From a config to objects; nothing else reads config sections."""
