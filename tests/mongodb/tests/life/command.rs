//! The command `throwaway-mongodb`. Its server ends when the command ends, for whatever reason.
//! Signals, output and exit codes of a wrapped command are passed on.

use std::io::{BufRead, BufReader, Write, pipe};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::traces::Traces;

fn throwaway(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_throwaway-mongodb"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Returns the first line that the process prints.
fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    line.trim().to_owned()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
}

fn code(child: &mut Child) -> Option<i32> {
    child.wait().unwrap().code()
}

#[tokio::test]
async fn a_server_ends_when_its_parent_is_killed() {
    let mut parent = throwaway(&[]).spawn().unwrap();
    let traces = Traces::of(&first_line(&mut parent)).await;
    parent.kill().unwrap();
    parent.wait().unwrap();
    traces.until_gone().await;
}

#[tokio::test]
async fn a_paused_server_also_ends_when_its_parent_is_killed() {
    let mut parent = throwaway(&[]).spawn().unwrap();
    let traces = Traces::of(&first_line(&mut parent)).await;
    traces.pause_and_hang_up();
    parent.kill().unwrap();
    parent.wait().unwrap();
    traces.until_gone().await;
}

#[tokio::test]
async fn ctrl_c_and_sigterm_end_the_command_and_remove_the_folder() {
    for end in [Signal::INT, Signal::TERM] {
        let mut parent = throwaway(&[]).spawn().unwrap();
        let traces = Traces::of(&first_line(&mut parent)).await;
        signal(&parent, end);
        assert_eq!(code(&mut parent), Some(0));
        assert!(!traces.folder.exists());
    }
}

#[test]
fn a_command_gets_the_uri_and_its_output_and_exit_code_are_passed_on() {
    let script = r#"echo "$LEASED_MONGODB_URI"; exit 7"#;
    let output = throwaway(&["--", "sh", "-c", script]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("mongodb://127.0.0.1:") && said.lines().count() == 1, "{said}");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn a_signal_that_ended_the_command_is_reported_as_by_a_shell() {
    let status = throwaway(&["sh", "-c", "kill -TERM $$"]).status().unwrap();
    assert_eq!(status.code(), Some(128 + 15));
}

#[test]
fn sigterm_is_passed_on_and_the_command_is_waited_for() {
    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.02; done";
    let mut parent = throwaway(&["sh", "-c", script]).spawn().unwrap();
    assert_eq!(first_line(&mut parent), "ready");
    signal(&parent, Signal::TERM);
    assert_eq!(code(&mut parent), Some(9));
}

#[test]
fn ctrl_c_is_left_to_the_command_and_the_command_is_waited_for() {
    let script = "echo ready; read -r word; exit \"$word\"";
    let mut parent = throwaway(&["sh", "-c", script]).spawn().unwrap();
    assert_eq!(first_line(&mut parent), "ready");
    signal(&parent, Signal::INT);
    parent.stdin.take().unwrap().write_all(b"5\n").unwrap();
    assert_eq!(code(&mut parent), Some(5));
}

#[test]
fn wrong_usage_and_a_missing_command_are_reported() {
    assert_eq!(throwaway(&["--nonsense"]).status().unwrap().code(), Some(2));
    let missing = throwaway(&["/nowhere/command"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8(missing.stderr).unwrap().contains("cannot run /nowhere/command"));
}

#[test]
fn without_a_mongod_the_command_says_how_to_get_one() {
    let folder = concat!(env!("CARGO_TARGET_TMPDIR"), "/no-mongod");
    let mut lacking = throwaway(&["true"]);
    lacking.env("CARGO_TARGET_DIR", folder).env("PATH", "/nowhere").env_remove("LEASED_MONGOD");
    let said = String::from_utf8(lacking.output().unwrap().stderr).unwrap();
    assert!(said.contains("install MongoDB 6.0 or newer"), "{said}");

    let named = throwaway(&["true"]).env("LEASED_MONGOD", "/nowhere/mongod").output().unwrap();
    assert_eq!(named.status.code(), Some(1));
    assert!(String::from_utf8(named.stderr).unwrap().contains("/nowhere/mongod"));
}

#[test]
fn output_that_nobody_reads_does_not_change_the_exit_code() {
    for (option, code) in [("--help", 0), ("--nonsense", 2)] {
        let broken = || pipe().unwrap().1;
        let status = throwaway(&[option]).stdout(broken()).stderr(broken()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{option}");
    }
}
