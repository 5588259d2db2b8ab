//! What the first process of a container adopts: processes whose parents have ended. Unless it waits for them they stay in the
//! table of processes for as long as the container runs.

use rustix::process::{Pid, WaitOptions, getpid, waitpid};

/// Waits for adopted processes that have ended. `own` are waited for elsewhere. Does nothing but in the first process.
pub(crate) fn reap(own: &[Pid]) {
    if !getpid().is_init() {
        return;
    }
    // To wait for any child would take the end of one's own.
    let children = std::fs::read_to_string("/proc/1/task/1/children").unwrap_or_default();
    let children = children.split_whitespace().filter_map(|number| Pid::from_raw(number.parse().ok()?));
    for orphan in children.filter(|child| !own.contains(child)) {
        let _ = waitpid(Some(orphan), WaitOptions::NOHANG);
    }
}
