//! Processor time and memory of processes, as `/proc` shows them. Without `/proc` there are no
//! figures.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

/// The processes of a contender, each with its kind.
pub(crate) type Processes = Vec<(&'static str, u32)>;

/// The kind of the load generator.
pub(crate) const LOAD: &str = "load";

/// The processor time of processes at an instant.
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

    /// The processor time that each kind of process has spent since.
    pub(crate) fn spent(self) -> Vec<(&'static str, Duration)> {
        let mut kinds: Vec<(&'static str, Duration)> = Vec::new();
        for (kind, id) in self.processes {
            let since = |(thread, now): (u32, Duration)| {
                now.saturating_sub(self.before.get(&thread).copied().unwrap_or_default())
            };
            let spent = threads(id).into_iter().map(since).sum();
            match kinds.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, sum)) => *sum += spent,
                None => kinds.push((kind, spent)),
            }
        }
        kinds
    }
}

/// The processor time of all kinds but the load generator.
pub(crate) fn under_load(spent: &[(&'static str, Duration)]) -> Duration {
    spent.iter().filter(|(kind, _)| *kind != LOAD).map(|(_, spent)| *spent).sum()
}

/// Reads how long each thread of a process has run, in nanoseconds, as the scheduler counts it. The
/// ticks of `/proc/ID/stat` are too coarse for processes that do little. The time of a thread that
/// ends between two readings is missing.
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
    fn the_processor_time_of_work_is_counted() {
        let cpu = Cpu::now(&Vec::new());
        let begun: Duration = cpu.before.values().sum();
        let now = || threads(std::process::id()).iter().map(|(_, time)| *time).sum::<Duration>();
        // Reading the times takes processor time itself.
        while now() <= begun {}
        let spent = cpu.spent();
        assert!(spent[0].1 > Duration::ZERO && spent[0].0 == LOAD);
        assert_eq!(under_load(&spent), Duration::ZERO);
        assert!(resident(std::process::id()).expect("a process") > 0);
    }
}
