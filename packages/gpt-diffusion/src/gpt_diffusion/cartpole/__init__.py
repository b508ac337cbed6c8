"""Cart-pole actors trained by reinforcement: the published third task."""
