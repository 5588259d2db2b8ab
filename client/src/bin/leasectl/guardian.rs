//! The end of a command that outlives its lease, come what may: a process that kills the command's group when leasectl is
//! gone, or did not say in time that the lease is held still, because it was stopped or starved.
//!
//! It is this program in another role. It makes the process group that the command then joins, so the two of them
//! are known to each other before the command begins, and the group's number cannot go to another while the guardian is
//! there. Its orders come through a pipe of which only leasectl has the other end, so the system itself closes it when
//! leasectl ends, in whatever way.

use std::io::{self, Read, Write, stdin, stdout};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdin, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, getppid, kill_process, kill_process_group, setpgid,
    test_kill_process_group, waitid, waitpid,
};
use signal_hook::flag::register;

use crate::processes::group_of;
use crate::times::{now, until};

/// The name under which this program guards. `killall leasectl` does not mean it.
pub(crate) const ROLE: &str = "lease-guard";

/// Timers stand still while the machine is suspended, so none is longer than this.
const NAP: Duration = Duration::from_secs(1);
/// How often to see whether anything is left of a group.
const LOOK: Duration = Duration::from_millis(10);

/// The signals of keys that end a command. The exit code of a guardian that was dismissed says which have come, a bit each.
pub(crate) const KEYS: [Signal; 2] = [Signal::INT, Signal::QUIT];

/// This program in its other role.
fn program() -> Command {
    // On Linux also when the file has been replaced or deleted since.
    let path = match cfg!(target_os = "linux") {
        true => PathBuf::from("/proc/self/exe"),
        false => std::env::current_exe().unwrap_or_else(|_| PathBuf::from("leasectl")),
    };
    let mut command = Command::new(path);
    command.arg0(ROLE);
    command
}

/// The guardian as leasectl sees it.
pub(crate) struct Guardian {
    group: Pid,
    orders: ChildStdin,
    /// When it kills the group.
    deadline: u64,
}

impl Guardian {
    /// Starts it, in a process group of its own, and returns when no signal to the group can end it any more but SIGKILL.
    pub(crate) fn start() -> io::Result<Self> {
        let mut command = program();
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let (Some(group), Some(orders), Some(mut answer)) = (group, child.stdin.take(), child.stdout.take())
        else {
            return Err(io::ErrorKind::Other.into());
        };
        answer.read_exact(&mut [0])?;
        // One that is stopped takes no orders, and must not hold up leasectl.
        ioctl_fionbio(&orders, true)?;
        Ok(Self { group, orders, deadline: u64::MAX })
    }

    /// The group that it guards.
    pub(crate) fn group(&self) -> Pid {
        self.group
    }

    /// Has the group killed at this time, unless told another before.
    pub(crate) fn until(&mut self, deadline: u64) {
        if deadline != self.deadline {
            self.deadline = deadline;
            self.order(&format!("until {deadline}"));
        }
    }

    /// When it kills the group, as it knows.
    pub(crate) fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Ends it; what is left of the group lives on.
    pub(crate) fn dismiss(&mut self) {
        self.order("dismiss");
    }

    /// Has it end when nothing is left of the group, which it kills at the deadline.
    pub(crate) fn clear(&mut self) {
        self.order("clear");
    }

    /// Whether it has ended: as it was told to, or killed.
    pub(crate) fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        // It is left as it is: while nobody has waited for it the group's number is its own.
        !matches!(waitid(WaitId::Pid(self.group), options), Ok(None))
    }

    /// Whether its group was sent one of the [`KEYS`], once it has ended. If it was killed, that is taken for granted.
    pub(crate) fn heard(&self, key: Signal) -> Option<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.group), options).ok()??;
        let heard = |code| KEYS.iter().position(|one| *one == key).is_some_and(|bit| code >> bit & 1 == 1);
        Some(status.exit_status().is_none_or(heard))
    }

    /// Continues it, if it was stopped.
    pub(crate) fn go_on(&self) {
        // Fails if it has ended.
        let _ = kill_process(self.group, Signal::CONT);
    }

    fn order(&mut self, order: &str) {
        // If it is gone, `has_ended` says so.
        drop(writeln!(self.orders, "{order}"));
    }
}

impl Drop for Guardian {
    /// Waits for it, where nobody else would: the first process of a container often waits for no children of others. One
    /// that has been dismissed ends within a moment, or is stopped and left alone.
    fn drop(&mut self) {
        let nap = Timespec::try_from(Duration::from_millis(1)).ok();
        for _ in 0..50 {
            if !matches!(waitpid(Some(self.group), WaitOptions::NOHANG), Ok(None)) {
                return;
            }
            let _ = poll(&mut [], nap.as_ref());
        }
    }
}

/// The guardian's process.
pub(crate) fn main() -> ExitCode {
    let _ = rustix::thread::set_name(c"lease-guard");
    let Some(group) = Pid::from_raw(i32::try_from(std::process::id()).unwrap_or_default()) else {
        return ExitCode::FAILURE;
    };
    let Ok(heard) = withstand() else { return ExitCode::FAILURE };
    if stdout().write_all(b".").and_then(|()| stdout().flush()).is_err() {
        return ExitCode::FAILURE;
    }
    match guard() {
        Verdict::Dismissed => {
            let bits =
                heard.iter().enumerate().map(|(bit, heard)| u8::from(heard.load(Ordering::Relaxed)) << bit);
            return ExitCode::from(bits.sum::<u8>());
        }
        Verdict::Clear(deadline) => clear(group, deadline),
        // Ends this process as well.
        Verdict::Kill => {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
    ExitCode::SUCCESS
}

/// What is to be done in the end.
enum Verdict {
    Dismissed,
    Clear(u64),
    Kill,
}

/// Takes orders until the end.
fn guard() -> Verdict {
    let (mut deadline, mut orders) = (u64::MAX, Vec::new());
    loop {
        let left = until(deadline);
        if left.is_zero() {
            return Verdict::Kill;
        }
        let nap = Timespec::try_from(left.min(NAP)).ok();
        match poll(&mut [PollFd::new(&stdin(), PollFlags::IN)], nap.as_ref()) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return Verdict::Kill,
        }
        let mut bytes = [0; 4096];
        match stdin().read(&mut bytes) {
            Ok(0) | Err(_) => return Verdict::Kill,
            Ok(length) => orders.extend_from_slice(&bytes[..length]),
        }
        while let Some(end) = orders.iter().position(|byte| *byte == b'\n') {
            let order: Vec<u8> = orders.drain(..=end).collect();
            match String::from_utf8_lossy(&order).trim() {
                "dismiss" => return Verdict::Dismissed,
                "clear" => return Verdict::Clear(deadline),
                order => match order.strip_prefix("until ").and_then(|time| time.parse().ok()) {
                    Some(time) => deadline = time,
                    None => return Verdict::Kill,
                },
            }
        }
    }
}

/// Waits until nothing is left of the group, and kills what is left of it at the deadline, or when leasectl is gone.
fn clear(group: Pid, deadline: u64) {
    // A group whose last member this process is would never be empty. Its number stays taken by this process. A group of
    // leasectl that a PID namespace hides cannot be joined: then what is left is killed at once.
    let left = getppid().and_then(|leasectl| group_of(Some(leasectl)));
    let left = left.is_some_and(|other| setpgid(None, Some(other)).is_ok());
    let nap = Timespec::try_from(LOOK).ok();
    let leasectl = getppid();
    while left && now() < deadline && getppid() == leasectl {
        if test_kill_process_group(group).is_err() {
            return;
        }
        let _ = poll(&mut [], nap.as_ref());
    }
    let _ = kill_process_group(group, Signal::KILL);
}

/// Handles the signals that a group is sent, by doing nothing but noting, for each of the [`KEYS`], that it has come.
fn withstand() -> io::Result<[Arc<AtomicBool>; KEYS.len()]> {
    let others = [
        Signal::HUP,
        Signal::TERM,
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        Signal::TSTP,
        Signal::TTIN,
        Signal::TTOU,
        Signal::PIPE,
    ];
    let heard: [Arc<AtomicBool>; KEYS.len()] = Default::default();
    let keys = KEYS.iter().zip(&heard).map(|(key, heard)| (key, Arc::clone(heard)));
    let others = others.iter().map(|other| (other, Arc::default()));
    keys.chain(others).try_for_each(|(signal, heard)| register(signal.as_raw(), heard).map(drop))?;
    Ok(heard)
}
