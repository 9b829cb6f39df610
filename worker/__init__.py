"""The answering side. What any of its processes needs before a library is loaded is set here."""

import os

# The GnuTLS in PyAV's wheels reads its settings from /tmp/vendor, where it was built: any user of the host may put a
# pipe there, for which an import would wait for ever, or settings of their own.
os.environ.setdefault("GNUTLS_SYSTEM_PRIORITY_FILE", os.devnull)
