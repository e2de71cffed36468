"""Every knob of the stack, frozen and validated, without torch."""
