//! A command whose lease is lost or in jeopardy.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Pid, Signal, getpgid, kill_process};
use tempfile::TempDir;

use crate::support::{Daemon, Process, lines, pid_in, state, until};

/// leasectl that runs a command. On SIGTERM the command writes to the file `heard`.
struct Run {
    process: Process,
    folder: TempDir,
}

impl Run {
    /// Starts the command, which also runs `on_term` on SIGTERM.
    fn start(daemon: &Daemon, options: &[&str], on_term: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"
            cd "$1"; trap "echo TERM >> heard; $2" TERM
            sleep 600 & echo $! > child; echo $$ > command
            while :; do wait; done"#;
        let options = [&["run", "a/key"], options, &["--", "bash", "-c", script, "bash"]].concat();
        let mut command = daemon.leasectl(&options);
        command.arg(folder.path()).arg(on_term).stderr(Stdio::piped());
        let run = Self { process: Process::spawn(&mut command), folder };
        run.command();
        run
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(self.folder.path()).join(name)
    }

    fn command(&self) -> Pid {
        pid_in(&self.file("command"))
    }

    fn heard(&self) -> bool {
        self.file("heard").exists()
    }

    /// Waits until the command and its child have ended.
    fn until_gone(&self) {
        let (command, child) = (self.command(), pid_in(&self.file("child")));
        until(|| [command, child].into_iter().all(|process| matches!(state(process), None | Some('Z'))));
    }
}

#[test]
fn a_lease_that_is_revoked_ends_the_command_at_once() {
    let daemon = Daemon::start();
    let run = Run::start(&daemon, &["--ttl=2s"], "");
    daemon.json(&["revoke", "a/key", "--reason=test"]);
    run.until_gone();
    assert!(
        !run.heard(),
        "the command must be killed without SIGTERM, since another may hold the key already"
    );
    let ended = run.process.end();
    assert_eq!(ended.code, Some(73));
    assert!(ended.stderr.contains("a/key") && ended.stderr.contains("revoked"), "{}", ended.stderr);
    assert!(ended.stderr.starts_with("leasectl: ") && ended.stderr.lines().count() == 1, "{}", ended.stderr);
}

#[test]
fn a_command_ends_by_sigterm_when_no_daemon_confirms_its_lease() {
    let mut daemon = Daemon::start();
    let run = Run::start(&daemon, &["--ttl=2s"], "kill %1; exit 0");
    daemon.kill();
    let heard = run.file("heard");
    run.until_gone();
    assert_eq!(lines(&heard, 1), ["TERM"]);
    let ended = run.process.end();
    assert_eq!(ended.code, Some(73), "the exit code does not depend on the command");
    assert!(ended.stderr.contains("no daemon confirmed the lease of a/key"), "{}", ended.stderr);
}

#[test]
fn a_command_that_does_not_end_on_sigterm_is_killed() {
    let daemon = Daemon::start();
    let run = Run::start(&daemon, &["--ttl=1s"], "");
    daemon.stop();
    run.until_gone();
    assert_eq!(lines(&run.file("heard"), 1), ["TERM"]);
    assert_eq!(run.process.end().code, Some(73));
    daemon.go_on();
}

#[test]
fn processes_that_a_command_started_are_killed_at_the_deadline() {
    let daemon = Daemon::start();
    // The command ends on SIGTERM, and its child does not.
    let run = Run::start(&daemon, &["--ttl=1s"], "exit 0");
    daemon.stop();
    run.until_gone();
    assert_eq!(run.process.end().code, Some(73));
    daemon.go_on();
}

#[test]
fn a_daemon_that_answers_again_does_not_save_the_command() {
    let daemon = Daemon::start();
    let run = Run::start(&daemon, &["--ttl=3s"], "");
    daemon.stop();
    let heard = run.file("heard");
    until(|| heard.exists());
    daemon.go_on();
    run.until_gone();
    let ended = run.process.end();
    assert_eq!(ended.code, Some(73), "{ended:?}");
    assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "leasectl has released the lease");
}

#[test]
fn an_outage_that_is_shorter_than_the_lease_harms_nothing() {
    let mut daemon = Daemon::start();
    let run = Run::start(&daemon, &["--ttl=30s"], "exit 0");
    daemon.restart();
    let expires = |key: &serde_json::Value| key["holders"][0]["expires_at"].as_str().map(ToOwned::to_owned);
    let before = expires(&daemon.json(&["get", "a/key"]));
    daemon.until_key("a/key", |key| expires(key) > before);
    assert!(!run.heard());
    kill_process(run.process.pid(), Signal::TERM).unwrap();
    let ended = run.process.end();
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_command_does_not_outlive_leasectl() {
    let daemon = Daemon::start();
    let mut run = Run::start(&daemon, &["--ttl=10m"], "");
    run.process.kill();
    run.until_gone();
    assert!(!run.heard());
}

#[test]
fn a_command_does_not_outlive_its_lease_when_leasectl_is_stopped() {
    let daemon = Daemon::start();
    let run = Run::start(&daemon, &["--ttl=1s"], "");
    run.process.stop();
    run.until_gone();
    assert!(!run.heard(), "SIGTERM was sent while leasectl was stopped");
    run.process.signal(Signal::CONT);
    let ended = run.process.end();
    assert_eq!(ended.code, Some(73), "{ended:?}");
}

#[test]
fn a_command_without_its_guardian_is_ended() {
    let daemon = Daemon::start();
    let run = Run::start(&daemon, &[], "");
    kill_process(getpgid(Some(run.command())).unwrap(), Signal::KILL).unwrap();
    run.until_gone();
    let ended = run.process.end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("guardian"), "{}", ended.stderr);
    assert_eq!(daemon.json(&["get", "a/key"])["state"], "free");
}

#[test]
fn a_failed_release_does_not_hide_how_the_command_ended() {
    let mut daemon = Daemon::start();
    let run = Run::start(&daemon, &["--timeout=300ms"], "exit 5");
    daemon.kill();
    run.process.signal(Signal::TERM);
    let ended = run.process.end();
    assert_eq!(ended.code, Some(5));
    assert!(ended.stderr.contains("could not be released"), "{}", ended.stderr);
}
