"""The methods of calibration; a file here with a class Method is one, by the name of the file."""
