"""What every other part uses: errors, files, paths, the machine, provenance."""
