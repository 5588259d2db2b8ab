//! Checks that leasectl can open enough files.

use std::io::{self, stdin};
use std::os::fd::{AsFd, OwnedFd};

use crate::failure::Failure;

/// 50 % more files than `run` opens, because a client of several daemons opens some more.
const NEEDED: usize = 20;

/// Makes sure that [`NEEDED`] files can be opened. Beyond the limit tokio panics. leasectl might
/// also acquire a lease, and then be unable to start the command or to release the lease.
pub(crate) fn make_sure_of_room() -> Result<(), Failure> {
    let stdin = stdin();
    let opened: io::Result<Vec<OwnedFd>> = (0..NEEDED).map(|_| stdin.as_fd().try_clone_to_owned()).collect();
    opened.map(drop).map_err(|error| {
        Failure::System(format!(
            "leasectl needs to open {NEEDED} files: {error}; raise the limit, for example with `ulimit -n 256`"
        ))
    })
}
