"""What a test of the widget in a real browser needs: notebook servers, a browser that remembers, a kernel."""
