// SPDX-License-Identifier: Apache-2.0

// Package packaging tests what is handed out: the Debian package, the systemd unit, the container. It builds them as a user
// would, installs them into directories of its own, and runs them: the unit under a real systemd, in namespaces.
package packaging
