"""What every verb printed and wrote before the code was moved, on studies with every feature."""
