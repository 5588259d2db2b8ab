//! Groups, sessions and parents of processes. Within a PID namespace those outside of it have the number 0, which
//! rustix takes for impossible.

use nix::unistd::{self, getpgid, getsid};
use rustix::process::Pid;

/// The group of a process, or of this one. `None` if there is no such process, or the group has no number here.
pub(crate) fn group_of(process: Option<Pid>) -> Option<Pid> {
    getpgid(process.map(to_nix)).ok().and_then(|group| Pid::from_raw(group.as_raw()))
}

/// The session of a process, or of this one. `None` if there is no such process, or the session has no number here.
pub(crate) fn session_of(process: Option<Pid>) -> Option<Pid> {
    getsid(process.map(to_nix)).ok().and_then(|session| Pid::from_raw(session.as_raw()))
}

fn to_nix(pid: Pid) -> unistd::Pid {
    unistd::Pid::from_raw(pid.as_raw_nonzero().get())
}

/// What `/proc/PID/stat` says of a process (proc(5)). Where there is no such file, as outside of Linux, no process is found.
pub(crate) struct Process {
    pub(crate) parent: Option<Pid>,
    pub(crate) group: Option<Pid>,
    pub(crate) session: Option<Pid>,
}

impl Process {
    /// `None` if there is no such process, or it has ended.
    pub(crate) fn read(pid: Pid) -> Option<Self> {
        let stat = std::fs::read(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        // The program's name comes before, in parentheses, and may itself hold blanks and parentheses.
        let (_, fields) = stat.rsplit_once(") ")?;
        let mut fields = fields.split(' ');
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let mut number = || Some(Pid::from_raw(fields.next()?.parse().ok()?));
        Some(Self { parent: number()?, group: number()?, session: number()? })
    }

    /// Every process that can be seen.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        pids.filter_map(Self::read)
    }
}
