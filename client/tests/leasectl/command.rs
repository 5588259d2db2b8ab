//! A command that runs under a lease that is not lost.

use std::process::Stdio;

use rstest::rstest;
use rustix::process::{Signal, kill_process};

use crate::support::{Daemon, LEASECTL, Process, end, leasectl, lines, pid_in, state, until};

#[test]
fn a_command_sees_its_lease_and_its_exit_code_is_that_of_leasectl() {
    let daemon = Daemon::start();
    let ended = daemon.end(&["run", "a/key", "--", "sh", "-c", "echo $LEASED_KEY $LEASED_TOKEN; exit 7"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(7), ""));
    let key = daemon.json(&["get", "a/key"]);
    assert_eq!(ended.stdout, format!("a/key {}\n", key["token"]));
    assert_eq!(key["state"], "free", "released");
    for (script, code) in [("exit 0", 0), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137)] {
        assert_eq!(daemon.end(&["run", "a/key", "--", "sh", "-c", script]).code, Some(code), "{script}");
    }
}

#[test]
fn options_can_come_from_the_environment() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let started = folder.path().join("started");
    let script = format!("echo $$ > {}; sleep 600", started.display());
    let mut command = daemon.leasectl(&["run", "a/key", "--", "sh", "-c", &script]);
    command.env("LEASED_TTL", "7s").env("LEASED_OWNER", "me").env("LEASED_SHARED", "3");
    command.env("LEASED_METADATA", "\n  a=1\n  b=2,3\n").env("LEASED_OUTPUT", "json");
    let _run = Process::spawn(&mut command);
    lines(&started, 1);
    let holder = &daemon.json(&["get", "a/key"])["holders"][0];
    assert_eq!((&holder["owner"], &holder["mode"]), (&"me".into(), &"shared".into()));
    assert_eq!(holder["ttl_ms"], 7_000);
    assert_eq!(holder["metadata"], serde_json::json!({ "a": "1", "b": "2,3" }));
}

#[test]
fn environment_variables_are_parsed_leniently() {
    let mut daemon = Daemon::start();
    let held = daemon.json(&["acquire", "a/key"]);
    daemon.end(&["run", "free/key", "--", "true"]);
    let ls = |name: &str, value: &str| {
        let mut command = daemon.leasectl(&["--output=json", "ls"]);
        let ended = end(command.env(name, value));
        assert_eq!(ended.code, Some(0), "{name}={value}: {ended:?}");
        ended.stdout.contains("free/key")
    };
    for (all, shown) in [("1", true), ("true", true), ("0", false), ("false", false), ("", false)] {
        assert_eq!(ls("LEASED_ALL", all), shown, "{all:?}");
    }
    let url = daemon.url();
    assert!(!ls("LEASED_ENDPOINT", &format!(" {url} , {url} ,")), "blanks around commas are ignored");
    assert!(!ls("LEASED_TIMEOUT", ""), "an empty variable counts as unset");
    assert!(held["token"].is_i64());
    daemon.kill();
}

#[test]
fn a_command_that_cannot_be_started_leaves_no_lease() {
    let daemon = Daemon::start();
    for (program, code) in [("/no/such/program", 127), ("no-such-program", 127), ("/dev/null", 126)] {
        let ended = daemon.end(&["run", "a/key", "--", program]);
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert!(ended.stderr.starts_with(&format!("leasectl: {program} ")), "{ended:?}");
        assert_eq!(daemon.json(&["get", "a/key"])["state"], "free");
    }
}

#[rstest]
fn signals_are_passed_on_to_the_whole_group(
    #[values(
        Signal::HUP,
        Signal::INT,
        Signal::QUIT,
        Signal::TERM,
        Signal::USR1,
        Signal::USR2,
        Signal::WINCH
    )]
    signal: Signal,
) {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    // The command starts a child, which must also get the signal.
    let script = r#"
        number=$1; folder=$2
        ( trap "echo child >> $folder/heard; exit 0" $number; echo ready >> $folder/ready; while :; do sleep 0.01; done ) &
        trap "echo command >> $folder/heard; wait; exit 9" $number
        echo ready >> $folder/ready
        while :; do sleep 0.01; done"#;
    let mut command = daemon.leasectl(&["run", "a/key", "--", "bash", "-c", script, "bash"]);
    let process = Process::spawn(command.arg(signal.as_raw().to_string()).arg(folder.path()));
    lines(&folder.path().join("ready"), 2);
    process.signal(signal);
    let mut heard = lines(&folder.path().join("heard"), 2);
    heard.sort();
    assert_eq!(heard, ["child", "command"]);
    assert_eq!(process.end().code, Some(9));
    assert_eq!(daemon.json(&["get", "a/key"])["state"], "free");
}

/// leasectl's guardian is in the process group of the command, and may end before the command does.
#[test]
fn a_command_that_kills_its_group_ends_like_one_that_kills_itself() {
    let daemon = Daemon::start();
    let guardian_first = "read -r _ _ _ _ group _ < /proc/$$/stat; kill -9 $group; kill -9 $$";
    for script in ["kill -9 0", guardian_first].repeat(5) {
        let ended = daemon.end(&["run", "a/key", "--", "sh", "-c", script]);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(137), ""), "{script}: {ended:?}");
        assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "released");
    }
}

/// A shell that runs leasectl in a script ends the script only if the signal also ends leasectl.
#[test]
fn a_forwarded_interrupt_that_ends_the_command_also_ends_leasectl() {
    let daemon = Daemon::start();
    for signal in [Signal::INT, Signal::QUIT] {
        let folder = tempfile::tempdir().unwrap();
        let started = folder.path().join("started");
        let mut command =
            daemon.leasectl(&["run", "a/key", "--", "sh", "-c", "echo $$ > $0; exec sleep 600"]);
        let process = Process::spawn(command.arg(&started));
        lines(&started, 1);
        process.signal(signal);
        assert_eq!(process.end().signal, Some(signal.as_raw()));
        assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "released");
    }
    for number in [Signal::INT.as_raw(), Signal::QUIT.as_raw()] {
        let script = format!("kill -{number} $$");
        let ended = daemon.end(&["run", "a/key", "--", "sh", "-c", &script]);
        assert_eq!(ended.code, Some(128 + number), "only the command got the signal: {ended:?}");
    }
}

#[test]
fn an_ignored_signal_stays_ignored() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let started = folder.path().join("started");
    let script =
        format!("trap '' HUP; exec \"$@\" -- sh -c 'echo $$ > {}; exec sleep 600'", started.display());
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script, "sh", LEASECTL, "run", "a/key"]);
    let mut process = Process::spawn(command.env("LEASED_ENDPOINT", daemon.url()));
    let sleep = pid_in(&started);
    process.signal(Signal::HUP);
    kill_process(sleep, Signal::HUP).unwrap();
    process.signal(Signal::TERM);
    until(|| !process.is_running());
    assert_eq!(process.end().code, Some(143), "HUP has no effect, and TERM ends the command");
}

#[test]
fn a_stop_and_a_continue_are_passed_on_while_the_lease_is_renewed() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let started = folder.path().join("started");
    let script = format!("echo $$ > {}; exec sleep 600", started.display());
    let command = daemon.leasectl(&["run", "a/key", "--ttl=6s", "--", "sh", "-c", &script]);
    // In a new session, no shell can continue the stopped processes.
    let mut setsid = std::process::Command::new("setsid");
    setsid.arg(command.get_program()).args(command.get_args()).env("LEASED_ENDPOINT", daemon.url());
    let process = Process::spawn(setsid.stderr(Stdio::piped()));
    let sleep = pid_in(&started);
    process.signal(Signal::TSTP);
    until(|| state(sleep) == Some('T'));
    let token = &daemon.json(&["get", "a/key"])["token"];
    let expires = |key: &serde_json::Value| key["holders"][0]["expires_at"].as_str().unwrap().to_owned();
    let before = expires(&daemon.json(&["get", "a/key"]));
    daemon.until_key("a/key", |key| &key["token"] == token && expires(key) > before);
    process.signal(Signal::CONT);
    until(|| state(sleep) == Some('S'));
    process.signal(Signal::TERM);
    assert_eq!(process.end().code, Some(143));
}

#[test]
fn a_signal_during_the_wait_leaves_the_queue() {
    let daemon = Daemon::start();
    daemon.json(&["acquire", "a/key"]);
    for signal in [Signal::INT, Signal::TERM] {
        let mut command = daemon.leasectl(&["run", "a/key", "--", "true"]);
        let process = Process::spawn(command.stderr(Stdio::piped()));
        daemon.until_key("a/key", |key| key["waiters"].as_array().unwrap().len() == 1);
        process.signal(signal);
        let ended = process.end();
        assert_eq!(
            (ended.signal, ended.stderr.as_str()),
            (Some(signal.as_raw()), ""),
            "leasectl ends as if it had no signal handler"
        );
        daemon.until_key("a/key", |key| key["waiters"].as_array().unwrap().is_empty());
    }
}

/// A command under `leasectl run` runs leasectl again for the key of its own lease.
#[test]
fn a_command_does_not_wait_for_its_own_lease() {
    let daemon = Daemon::start();
    let nested = |options: &str| {
        let script = format!("{LEASECTL} run $LEASED_KEY {options} -- echo nested");
        daemon.end(&["run", "a/key", "--shared", "--", "sh", "-c", &script])
    };
    let refused = nested("");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("already runs under the lease of a/key"), "{refused:?}");
    assert_eq!(nested("--wait 0").code, Some(75), "a call that does not wait is refused as usual");
    assert_eq!(nested("--shared").stdout, "nested\n", "two shared leases do not exclude each other");
}

/// In a container leasectl is the process with id 1, and so the parent of all processes whose own
/// parent has ended.
#[test]
fn as_process_1_leasectl_waits_for_orphans() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let script = "sh -c 'sleep 0.1 & echo $! > $0' $0; orphan=$(cat $0); \
                  while [ -e /proc/$orphan ]; do sleep 0.02; done; echo gone";
    let mut command = std::process::Command::new("unshare");
    command.args(["--map-root-user", "--pid", "--fork", "--mount-proc", LEASECTL, "run", "a/key", "--"]);
    command.args(["sh", "-c", script]).arg(folder.path().join("orphan"));
    command.env("LEASED_ENDPOINT", daemon.url()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = Process::spawn(&mut command).end();
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "gone\n"), "{ended:?}");
}

/// Standard error is closed, or is a file on a full disk.
#[test]
fn an_error_that_cannot_be_printed_does_not_change_the_exit_code() {
    let mut daemon = Daemon::start();
    daemon.kill();
    for stderr in ["2>&-", "2>/dev/full"] {
        let command = leasectl(&["--timeout", "1s", "get", "a/key"]);
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &format!("exec \"$@\" {stderr}"), "sh"]).arg(command.get_program());
        shell.args(command.get_args()).env("LEASED_ENDPOINT", daemon.url());
        assert_eq!(end(&mut shell).code, Some(69), "{stderr}");
    }
}

#[test]
fn commands_under_one_key_never_overlap() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let script = "echo begin >> $0; sleep 0.02; echo end >> $0";
    let runs: Vec<Process> = (0..10)
        .map(|_| {
            let mut command = daemon.leasectl(&["run", "a/key", "--", "sh", "-c", script]);
            Process::spawn(command.arg(&log))
        })
        .collect();
    for run in runs {
        assert_eq!(run.end().code, Some(0));
    }
    let expected: Vec<&str> = ["begin", "end"].into_iter().cycle().take(20).collect();
    assert_eq!(lines(&log, 20), expected);
}

#[test]
fn processes_that_a_command_leaves_running_are_not_killed() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let left = folder.path().join("left");
    let script = "sleep 600 > /dev/null 2>&1 & echo $! > $0";
    let ended = end(daemon.leasectl(&["run", "a/key", "--", "sh", "-c", script]).arg(&left));
    assert_eq!(ended.code, Some(0));
    let left = pid_in(&left);
    assert!(matches!(state(left), Some('S')), "{:?}", state(left));
    kill_process(left, Signal::KILL).unwrap();
}

/// Without a second signal, leasectl tries for up to `--timeout` to release the lease at a daemon
/// that does not answer.
#[test]
fn a_second_signal_ends_leasectl_while_it_releases_the_lease() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let started = folder.path().join("started");
    let mut command = daemon.leasectl(&["run", "a/key", "--timeout=10m", "--"]);
    command.args(["sh", "-c", "echo $$ > $0; exec sleep 600"]).arg(&started);
    let mut process = Process::spawn(&mut command);
    let sleep = pid_in(&started);
    daemon.stop();
    kill_process(sleep, Signal::KILL).unwrap();
    until(|| state(sleep).is_none());
    until(|| {
        process.signal(Signal::TERM);
        !process.is_running()
    });
    assert_eq!(process.end().signal, Some(Signal::TERM.as_raw()));
    daemon.go_on();
}
