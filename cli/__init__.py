"""Command lines: parse, call, report. No logic, and nothing heavy until a command needs it."""
