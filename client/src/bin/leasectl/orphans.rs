//! Orphans: processes whose parents have ended, and which the first process of a container adopts.
//! Unless it waits for them they stay in the process table for as long as the container runs.

use rustix::process::{Pid, WaitOptions, getpid, waitpid};

/// Waits for adopted processes that have ended, but not for `own`. Does nothing unless this process
/// has the id 1.
pub(crate) fn reap(own: &[Pid]) {
    if !getpid().is_init() {
        return;
    }
    // Waits for each orphan by its id: a wait for any child would also reap one of `own`, whose
    // exit status is read elsewhere.
    let children = std::fs::read_to_string("/proc/1/task/1/children").unwrap_or_default();
    let children = children.split_whitespace().filter_map(|number| Pid::from_raw(number.parse().ok()?));
    for orphan in children.filter(|child| !own.contains(child)) {
        let _ = waitpid(Some(orphan), WaitOptions::NOHANG);
    }
}
