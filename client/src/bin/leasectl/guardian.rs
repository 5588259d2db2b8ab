//! The guardian: a process that kills the command's process group if leasectl cannot do so in time,
//! because leasectl is gone, or is stopped or starved and has not extended the deadline.
//!
//! The guardian is this program in another role. It makes the process group that the command then
//! joins. So the group is known before the command starts, and its number cannot be reused while
//! the guardian exists. leasectl sends orders through a pipe. Only leasectl has the other end, so
//! the system closes the pipe when leasectl ends, in whatever way.

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

/// The process name of the guardian. It differs from leasectl's, so that `killall leasectl` spares
/// the guardian.
pub(crate) const ROLE: &str = "lease-guard";

/// The longest timer. Timers stop while the machine is suspended.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How often the guardian checks whether its group is empty.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The signals of terminal keys that end a command. The exit code of a dismissed guardian says
/// which of these signals it has received, one bit each.
pub(crate) const KEYS: [Signal; 2] = [Signal::INT, Signal::QUIT];

/// Returns the command that starts this program as the guardian.
fn program() -> Command {
    // On Linux this works even if the file has been replaced or deleted since.
    let path = match cfg!(target_os = "linux") {
        true => PathBuf::from("/proc/self/exe"),
        false => std::env::current_exe().unwrap_or_else(|_| PathBuf::from("leasectl")),
    };
    let mut command = Command::new(path);
    command.arg0(ROLE);
    command
}

/// leasectl's handle of the guardian.
pub(crate) struct Guardian {
    group: Pid,
    orders: ChildStdin,
    /// When the guardian kills the group.
    deadline: u64,
}

impl Guardian {
    /// Starts the guardian in a new process group. Returns once no signal to the group but SIGKILL
    /// can end the guardian.
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
        // A stopped guardian reads no orders, and must not block leasectl.
        ioctl_fionbio(&orders, true)?;
        Ok(Self { group, orders, deadline: u64::MAX })
    }

    /// The process group that the guardian guards.
    pub(crate) fn group(&self) -> Pid {
        self.group
    }

    /// Orders the guardian to kill the group at `deadline`, unless another deadline is set before.
    pub(crate) fn until(&mut self, deadline: u64) {
        if deadline != self.deadline {
            self.deadline = deadline;
            self.order(&format!("until {deadline}"));
        }
    }

    /// The deadline that was last set.
    pub(crate) fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Ends the guardian. The rest of the group lives on.
    pub(crate) fn dismiss(&mut self) {
        self.order("dismiss");
    }

    /// Orders the guardian to end once its group is empty, and to kill the group at the deadline.
    pub(crate) fn clear(&mut self) {
        self.order("clear");
    }

    /// Whether the guardian has ended.
    pub(crate) fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        // NOWAIT leaves it a zombie, so that the number of its group cannot be reused yet.
        !matches!(waitid(WaitId::Pid(self.group), options), Ok(None))
    }

    /// Whether the group was sent `key`, one of the [`KEYS`]. `None` until the guardian has ended;
    /// true if the guardian was killed.
    pub(crate) fn received(&self, key: Signal) -> Option<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.group), options).ok()??;
        let is_set = |code| KEYS.iter().position(|one| *one == key).is_some_and(|bit| code >> bit & 1 == 1);
        Some(status.exit_status().is_none_or(is_set))
    }

    /// Continues the guardian, if it was stopped.
    pub(crate) fn go_on(&self) {
        // Fails if the guardian has ended.
        let _ = kill_process(self.group, Signal::CONT);
    }

    fn order(&mut self, order: &str) {
        // Fails if the guardian is gone, which `has_ended` reports.
        let _ = writeln!(self.orders, "{order}");
    }
}

impl Drop for Guardian {
    /// Waits up to 50 ms for the guardian to end, so that it does not stay a zombie: the first
    /// process of a container often does not wait for adopted processes. A dismissed guardian ends
    /// at once, unless it is stopped.
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

/// The main function of the guardian.
pub(crate) fn main() -> ExitCode {
    let _ = rustix::thread::set_name(c"lease-guard");
    let Some(group) = Pid::from_raw(i32::try_from(std::process::id()).unwrap_or_default()) else {
        return ExitCode::FAILURE;
    };
    let Ok(received) = withstand() else { return ExitCode::FAILURE };
    if stdout().write_all(b".").and_then(|()| stdout().flush()).is_err() {
        return ExitCode::FAILURE;
    }
    match guard() {
        Verdict::Dismissed => {
            let bits = received
                .iter()
                .enumerate()
                .map(|(bit, received)| u8::from(received.load(Ordering::Relaxed)) << bit);
            return ExitCode::from(bits.sum::<u8>());
        }
        Verdict::Clear(deadline) => clear(group, deadline),
        // Kills this process as well.
        Verdict::Kill => {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
    ExitCode::SUCCESS
}

/// How the guardian ends.
enum Verdict {
    Dismissed,
    Clear(u64),
    Kill,
}

/// Follows orders until the deadline passes, leasectl is gone, or an order ends the guardian.
fn guard() -> Verdict {
    let (mut deadline, mut orders) = (u64::MAX, Vec::new());
    loop {
        let left = until(deadline);
        if left.is_zero() {
            return Verdict::Kill;
        }
        let nap = Timespec::try_from(left.min(LONGEST_SLEEP)).ok();
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

/// Waits until the group is empty. Kills what is left of the group at the deadline, or when
/// leasectl is gone.
fn clear(group: Pid, deadline: u64) {
    // The group would never be empty with this process in it, so this process joins leasectl's
    // group. The group's number is not reused, because it is also the id of this process. If a PID
    // namespace hides leasectl's group, it cannot be joined, and the rest of the command's group is
    // killed at once.
    let other = getppid().and_then(|leasectl| group_of(Some(leasectl)));
    let has_left = other.is_some_and(|other| setpgid(None, Some(other)).is_ok());
    let nap = Timespec::try_from(POLL_INTERVAL).ok();
    let leasectl = getppid();
    // This process gets another parent when leasectl ends.
    while has_left && now() < deadline && getppid() == leasectl {
        if test_kill_process_group(group).is_err() {
            return;
        }
        let _ = poll(&mut [], nap.as_ref());
    }
    let _ = kill_process_group(group, Signal::KILL);
}

/// Handles the signals that a group may be sent, so that they do not end this process. Returns a
/// flag for each of the [`KEYS`], which is set when that signal arrives.
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
    let received: [Arc<AtomicBool>; KEYS.len()] = Default::default();
    let keys = KEYS.iter().zip(&received).map(|(key, flag)| (key, Arc::clone(flag)));
    let others = others.iter().map(|other| (other, Arc::default()));
    keys.chain(others).try_for_each(|(signal, flag)| register(signal.as_raw(), flag).map(drop))?;
    Ok(received)
}
