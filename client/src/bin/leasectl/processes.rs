//! Groups, sessions and parents of processes. Uses nix, because in a PID namespace a group or
//! session from outside has the number 0, which rustix does not expect.

use nix::unistd::{self, getpgid, getsid};
use rustix::process::Pid;

/// The group of `process`, or of this process. `None` if there is no such process, or its group is
/// outside of this PID namespace.
pub(crate) fn group_of(process: Option<Pid>) -> Option<Pid> {
    getpgid(process.map(to_nix)).ok().and_then(|group| Pid::from_raw(group.as_raw()))
}

/// The session of `process`, or of this process. `None` if there is no such process, or its session
/// is outside of this PID namespace.
pub(crate) fn session_of(process: Option<Pid>) -> Option<Pid> {
    getsid(process.map(to_nix)).ok().and_then(|session| Pid::from_raw(session.as_raw()))
}

fn to_nix(pid: Pid) -> unistd::Pid {
    unistd::Pid::from_raw(pid.as_raw_nonzero().get())
}

/// A process, as `/proc/PID/stat` describes it (proc(5)). Only Linux has this file: on other
/// systems no process is found.
pub(crate) struct Process {
    pub(crate) parent: Option<Pid>,
    pub(crate) group: Option<Pid>,
    pub(crate) session: Option<Pid>,
}

impl Process {
    /// Reads a process. `None` if there is no such process, or it has ended.
    pub(crate) fn read(pid: Pid) -> Option<Self> {
        let stat = std::fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        // Splits at the last parenthesis: the program's name comes before it, and may itself
        // contain blanks and parentheses.
        let (_, fields) = stat.rsplit_once(") ")?;
        let mut fields = fields.split(' ');
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let mut number = || Some(Pid::from_raw(fields.next()?.parse().ok()?));
        Some(Self { parent: number()?, group: number()?, session: number()? })
    }

    /// Every process that is visible.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        pids.filter_map(Self::read)
    }
}
