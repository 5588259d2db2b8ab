//! What processes spend of the processors and of the memory, as `/proc` says, where there is one.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

/// The processes of a contender by kind; the load generator is one more.
pub(crate) type Processes = Vec<(&'static str, u32)>;

/// How the load generator is called beside the processes under load.
pub(crate) const LOAD: &str = "load";

/// Processor time at an instant.
#[derive(Debug)]
pub(crate) struct Cpu {
    processes: Processes,
    before: HashMap<u32, Duration>,
}

impl Cpu {
    pub(crate) fn now(processes: &Processes) -> Self {
        let processes: Processes = processes.iter().copied().chain([(LOAD, std::process::id())]).collect();
        let before = processes.iter().flat_map(|(_, id)| threads(*id)).collect();
        Self { processes, before }
    }

    /// What each kind has spent since.
    pub(crate) fn spent(self) -> Vec<(&'static str, Duration)> {
        let mut kinds: Vec<(&'static str, Duration)> = Vec::new();
        for (kind, id) in self.processes {
            let since = |(thread, now): (u32, Duration)| {
                now.saturating_sub(self.before.get(&thread).copied().unwrap_or_default())
            };
            let spent = threads(id).into_iter().map(since).sum();
            match kinds.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, sum)) => *sum += spent,
                None => kinds.push((kind, spent)),
            }
        }
        kinds
    }
}

/// What all but the load generator have spent.
pub(crate) fn under_load(spent: &[(&'static str, Duration)]) -> Duration {
    spent.iter().filter(|(kind, _)| *kind != LOAD).map(|(_, spent)| *spent).sum()
}

/// The time that each thread of a process has run, to the nanosecond, as the scheduler counts it: the ticks of
/// `/proc/ID/stat` are too coarse for processes that do little. What a thread spends that ends meanwhile is not seen.
fn threads(process: u32) -> Vec<(u32, Duration)> {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    let ran = |thread: fs::DirEntry| {
        let times = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let time = times.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)?;
        Some((thread.file_name().to_str()?.parse().ok()?, time))
    };
    threads.flatten().filter_map(ran).collect()
}

/// The memory of a process that is in use, in bytes.
pub(crate) fn resident(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn work_is_seen() {
        let cpu = Cpu::now(&Vec::new());
        let begun: Duration = cpu.before.values().sum();
        let now = || threads(std::process::id()).iter().map(|(_, time)| *time).sum::<Duration>();
        // To look is work, too.
        while now() <= begun {}
        let spent = cpu.spent();
        assert!(spent[0].1 > Duration::ZERO && spent[0].0 == LOAD);
        assert_eq!(under_load(&spent), Duration::ZERO);
        assert!(resident(std::process::id()).expect("a process") > 0);
    }
}
