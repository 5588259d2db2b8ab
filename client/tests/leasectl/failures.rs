//! Failures: exit codes, and sentences that say what to do.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Daemon, Ended, PATIENCE, Process, end, leasectl, until};

/// Checks that leasectl ended with this code and one sentence, which contains all of `words`.
fn assert_says(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert!(ended.stderr.starts_with("leasectl: ") && ended.stdout.is_empty(), "{ended:?}");
    for word in words {
        assert!(ended.stderr.contains(word), "{word}: {ended:?}");
    }
}

#[test]
fn held_by_another_is_75_and_names_the_holder() {
    let daemon = Daemon::start();
    daemon.json(&["acquire", "a/key", "--owner=first"]);
    for wait in ["--wait=0", "--wait=100ms"] {
        assert_says(&daemon.end(&["acquire", "a/key", wait]), 75, &["first", "--wait"]);
        let run = ["run", "a/key", wait, "--", "echo", "ran"];
        assert_says(&daemon.end(&run), 75, &["first", "--wait"]);
    }
    let held = daemon.end(&["run", "b/key", "--min-hold=60s", "--", "true"]);
    assert_eq!(held.code, Some(0), "{held:?}");
    assert_says(&daemon.end(&["acquire", "b/key", "--wait=0"]), 75, &["blocked", "--min-hold"]);

    daemon.json(&["acquire", "c/key", "--shared"]);
    let mut second = daemon.leasectl(&["acquire", "c/key", "--owner=second"]);
    let _second = Process::spawn(second.stdout(Stdio::null()));
    daemon.until_key("c/key", |key| !key["waiters"].as_array().unwrap().is_empty());
    assert_says(&daemon.end(&["acquire", "c/key", "--shared", "--wait=0"]), 75, &["second came before"]);
}

/// On the first signal leasectl tries to leave the queue, but the daemon is stopped and does not
/// answer.
#[test]
fn a_second_signal_ends_a_wait_that_no_daemon_can_end() {
    let daemon = Daemon::start();
    daemon.json(&["acquire", "a/key"]);
    let mut wait = daemon.leasectl(&["--timeout=600s", "run", "a/key", "--ttl=1h", "--", "true"]);
    let mut wait = Process::spawn(wait.stderr(Stdio::null()));
    daemon.until_key("a/key", |key| !key["waiters"].as_array().unwrap().is_empty());
    daemon.stop();
    let start = Instant::now();
    // The signal is sent again and again, since two of a kind that arrive at once count as one.
    until(|| {
        if wait.is_running() {
            wait.signal(Signal::INT);
        }
        !wait.is_running()
    });
    assert!(
        start.elapsed() < PATIENCE / 2,
        "leasectl ends because of the second signal, not after a timeout"
    );
    assert_eq!(wait.end().signal, Some(Signal::INT.as_raw()));
}

#[test]
fn an_unknown_key_is_1_and_a_lost_lease_73() {
    let daemon = Daemon::start();
    assert_says(&daemon.end(&["get", "a/key"]), 1, &["never leased", "ls --all"]);
    assert_says(&daemon.end(&["revoke", "a/key", "--reason=test"]), 1, &["nothing to revoke"]);
    let id = "0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02";
    assert_says(&daemon.end(&["touch", "a/key", id]), 73, &["acquire it again"]);
    assert_says(&daemon.end(&["release", "a/key", id]), 73, &["acquire it again"]);
}

#[test]
fn wrong_usage_is_2() {
    let daemon = Daemon::start();
    for (arguments, named) in [
        (&[][..], "--help"),
        (&["nonsense"], "nonsense"),
        (&["ls", "--nonsense"], "--nonsense"),
        (&["run", "a/key"], "CMD"),
        (&["run", "a/key", "true"], "leasectl run KEY -- CMD"),
        (&["run", "a/key", "--"], "CMD"),
        (&["run", "a/key", "--", ""], "the command is empty"),
        (&["run", "a/key", "--ttl=soon", "--", "true"], "--ttl"),
        (&["run", "a/key", "--wait=9999years", "--", "true"], "--wait"),
        (&["run", "a/key", "--ttl=1ms", "--", "true"], "ttl must be between"),
        (&["run", "--shared", "3", "--", "true"], "--shared=3 KEY"),
        (&["acquire", "a/key", "--shared", "3"], "--shared=3 KEY"),
        (&["acquire", "a/key", "--wait=2h"], "wait"),
        (&["acquire", "a/key", "--metadata=x"], "NAME=VALUE"),
        (&["acquire", "a/key", "--metadata="], "NAME=VALUE"),
        (&["acquire", "a/key", "--metadata", "=x"], "NAME=VALUE"),
        (&["acquire", ""], "key"),
        (&["revoke", "a/key"], "--reason"),
        (&["revoke", "a/key", "--reason=r", "--token=0"], "--token"),
        (&["touch", "a/key"], "ID"),
        (&["touch", "a/key", "nonsense"], "UUID"),
        (&["--endpoint=nonsense", "ls"], "endpoint"),
        (&["--endpoint=http://127.0.0.1:99999", "ls"], "port"),
        (&["--endpoint=http://127.0.0.1:5327/path", "ls"], "more than a host and a port"),
        (&["--endpoint=http://user:pw@127.0.0.1:5327", "ls"], "no user and no password"),
        (&["--timeout=0", "ls"], "--timeout"),
        (&["--output=xml", "ls"], "--output"),
    ] {
        assert_says(&daemon.end(arguments), 2, &[named]);
    }
}

#[test]
fn no_daemon_is_69() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{closed}");
    for command in [
        &["ls"][..],
        &["get", "a/key"],
        &["watch"],
        &["acquire", "a/key"],
        &["run", "a/key", "--", "true"],
        &["run", "a/key", "--wait=0", "--", "true"],
    ] {
        let mut arguments = vec!["--endpoint", &url, "--timeout=2s"];
        arguments.extend(command);
        assert_says(&end(&mut leasectl(&arguments)), 69, &[&url, "refused", "LEASED_ENDPOINT"]);
    }
}

#[test]
fn any_of_several_daemons_may_answer() {
    let daemon = Daemon::start();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for _ in 0..8 {
        let both = format!("http://{closed},{}", daemon.url());
        let ended = end(leasectl(&["ls"]).env("LEASED_ENDPOINT", both));
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
}

/// Starts a server that is not a leased daemon. It answers the first bytes of each connection with
/// `answer`, and then only reads.
fn stranger(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // Ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                drop(stream.read(&mut [0; 1024]));
                drop(stream.write_all(answer));
                drop(std::io::copy(&mut stream, &mut std::io::sink()));
            });
        }
    });
    url
}

#[test]
fn a_server_that_is_not_a_leased_daemon_is_69_and_named_as_such() {
    let http = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    // These are a SETTINGS frame, an acknowledgement of the client's, and a response with status
    // 404 (an index into HPACK's static table).
    let http2 = b"\0\0\0\x04\0\0\0\0\0\0\0\0\x04\x01\0\0\0\0\0\0\x01\x01\x05\0\0\0\x01\x8d";
    for (answer, why) in [
        (&http[..], "does not speak gRPC"),
        (b"220 mail.example ESMTP ready\r\n", "does not speak gRPC"),
        (http2, "no leases"),
    ] {
        let url = stranger(answer);
        let ended = end(&mut leasectl(&["--endpoint", &url, "--timeout=500ms", "ls"]));
        assert_says(&ended, 69, &[&url, "is not a leased daemon", why]);
    }
}

/// The server that is not a leased daemon may be the only endpoint, or there may be another
/// endpoint where no process listens.
#[test]
fn a_server_that_is_not_a_leased_daemon_has_the_same_reason_beside_a_closed_port() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = stranger(b"220 mail.example ESMTP ready\r\n");
    for endpoints in [url.clone(), format!("http://{closed},{url}")] {
        let arguments = ["--output=json", "--endpoint", &endpoints, "--timeout=500ms", "ls"];
        let ended = end(&mut leasectl(&arguments));
        let failure: Value = serde_json::from_str(&ended.stderr).unwrap();
        assert!(failure["error"]["message"].as_str().unwrap().contains("does not speak gRPC"), "{failure}");
        assert_eq!((ended.code, &failure["error"]["reason"]), (Some(69), &"NOT_LEASED".into()), "{failure}");
    }
}

/// Starts a server that accepts connections and closes them. If it does not read first, closing
/// resets the connection.
fn closes(reads: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // Ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if reads {
                drop(stream.read(&mut [0; 1024]));
            }
        }
    });
    url
}

/// A daemon closes connections beyond its limit, and a proxy closes them if it has no daemon.
#[test]
fn a_server_that_closes_connections_at_once_may_be_a_leased_daemon() {
    let daemon = Daemon::start_with(&["--max-connections=1"]);
    let _only = std::net::TcpStream::connect(&daemon.address).unwrap();
    for url in [closes(false), closes(true), daemon.url()] {
        let ended = end(&mut leasectl(&["--endpoint", &url, "--timeout=500ms", "acquire", "a/key"]));
        assert_says(&ended, 69, &[&url, "closed before any answer", "--max-connections"]);
        let ended = end(&mut leasectl(&["--output=json", "--endpoint", &url, "--timeout=500ms", "ls"]));
        let failure: Value = serde_json::from_str(&ended.stderr).unwrap();
        assert_eq!((ended.code, &failure["error"]["reason"]), (Some(69), &"UNAVAILABLE".into()), "{failure}");
    }
}

/// The system accepts connections for a stopped process, so a silent server may be a leased daemon.
#[test]
fn a_stopped_daemon_is_not_reported_as_another_server() {
    let daemon = Daemon::start();
    daemon.stop();
    let ended = daemon.end(&["--timeout=500ms", "ls"]);
    daemon.go_on();
    assert_says(&ended, 69, &[&daemon.url(), "may be stopped"]);
    assert!(!ended.stderr.contains("is not a leased daemon"), "{ended:?}");
}

#[test]
fn scripts_get_failures_as_json() {
    let daemon = Daemon::start();
    daemon.json(&["acquire", "a/key", "--owner=first"]);
    let failure = |arguments: &[&str], code: i32| -> Value {
        let ended = daemon.end(&[&["--output=json"], arguments].concat());
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{ended:?}");
        let mut failure: Value = serde_json::from_str(&ended.stderr).unwrap();
        assert_eq!(failure["error"]["exit_code"], code, "{failure}");
        assert!(!failure["error"]["message"].as_str().unwrap().is_empty(), "{failure}");
        failure["error"].take()
    };
    let held = failure(&["acquire", "a/key", "--wait=0"], 75);
    assert_eq!((&held["reason"], &held["holder"]["owner"]), (&"LEASE_HELD".into(), &"first".into()));
    assert!(held["holder"]["token"].is_i64() && held["holder"]["remaining_ms"].is_u64(), "{held}");
    assert_eq!(held["blocked_by"], "holder");
    daemon.json(&["acquire", "shared/key", "--shared=1"]);
    assert_eq!(failure(&["acquire", "shared/key", "--shared=1", "--wait=0"], 75)["blocked_by"], "limit");
    let unknown = failure(&["get", "b/key"], 1);
    assert_eq!((&unknown["reason"], unknown.get("blocked_by")), (&"KEY_UNKNOWN".into(), None));
    let id = "0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02";
    assert_eq!(failure(&["touch", "a/key", id], 73)["reason"], "LEASE_LOST");
    assert_eq!(failure(&["acquire", "a/key", "--ttl=1ms"], 2)["reason"], "INVALID_REQUEST");
    assert_eq!(failure(&["run", "b/key", "--", "/no/such/program"], 127)["reason"], "COMMAND_NOT_STARTED");
}

/// If the limit on open files is too low, leasectl must not acquire a lease that it could not
/// release.
#[test]
fn too_few_open_files_are_71_and_leave_no_lease() {
    let daemon = Daemon::start();
    let run = |files: u32| {
        let command = daemon.leasectl(&["run", "a/key", "--ttl=1h", "--wait=0", "--", "true"]);
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &format!("ulimit -n {files}; exec \"$@\""), "sh"]).arg(command.get_program());
        end(shell.args(command.get_args()).env("LEASED_ENDPOINT", daemon.url()))
    };
    for files in [4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48] {
        let ended = run(files);
        match ended.code {
            Some(0) => {}
            _ => assert_says(&ended, 71, &["ulimit -n"]),
        }
        assert_eq!(daemon.json(&["ls"]), serde_json::json!([]), "{files}: {ended:?}");
    }
    assert_says(&run(6), 71, &["ulimit -n"]);
    assert_eq!(run(48).code, Some(0));
}

#[test]
fn help_is_also_a_command() {
    let help = end(&mut leasectl(&["help", "run"]));
    assert_eq!(help.code, Some(0), "{help:?}");
    assert!(help.stdout.contains("Usage: leasectl run"), "{help:?}");
}
