//! Room for the files that leasectl opens.

use std::io::{self, stdin};
use std::os::fd::{AsFd, OwnedFd};

use crate::failure::Failure;

/// More files than `run` opens, by half: a client with several daemons needs some more.
const NEEDED: usize = 20;

/// Makes sure that so many files may be opened: past the limit tokio panics, and a lease is granted whose command cannot be
/// started and which cannot be given back.
pub(crate) fn make_sure_of_room() -> Result<(), Failure> {
    let stdin = stdin();
    let opened: io::Result<Vec<OwnedFd>> = (0..NEEDED).map(|_| stdin.as_fd().try_clone_to_owned()).collect();
    opened.map(drop).map_err(|error| {
        Failure::System(format!(
            "leasectl opens up to {NEEDED} files, and may not: {error}; raise the limit, as by `ulimit -n 256`"
        ))
    })
}
