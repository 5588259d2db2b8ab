//! The API's compatibility: a program built against the last release also works with the next.
//!
//! The folder `wire_contract/` has the API of the last release; `buf.yaml` has the rules.

use std::fs;
use std::path::Path;

use crate::support::tools;

const API: &str = "proto/leased/v1/lease.proto";

/// Returns the complaints of a `buf` check in the repository, or in another folder with the same
/// layout.
async fn complaints(folder: &Path, check: &[&str]) -> String {
    let mut buf = tools::buf().unwrap();
    buf.args(check).current_dir(folder);
    let output = tools::run(buf).await;
    let complaints = tools::text(&output);
    assert_eq!(output.status.success(), complaints.is_empty(), "{complaints}");
    complaints
}

/// Returns what in the API of `folder` is incompatible with the last release.
async fn breaks(folder: &Path) -> String {
    let released = tools::root().join("tests/wire_contract");
    complaints(folder, &["breaking", "--against", released.to_str().unwrap()]).await
}

#[tokio::test]
async fn the_api_passes_the_lint_rules() {
    assert_eq!(complaints(tools::root(), &["lint"]).await, "");
}

#[tokio::test]
async fn the_api_is_compatible_with_the_last_release() {
    assert_eq!(breaks(tools::root()).await, "");
}

#[tokio::test]
async fn a_removed_field_and_a_badly_spelt_name_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(API);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::copy(tools::root().join("buf.yaml"), folder.path().join("buf.yaml")).unwrap();
    let whole = fs::read_to_string(tools::root().join(API)).unwrap();

    let field = whole.lines().find(|line| line.contains("bool waited = 6;")).unwrap();
    fs::write(&file, whole.replace(field, "")).unwrap();
    let noticed = breaks(folder.path()).await;
    assert!(noticed.contains("\"waited\" on message \"AcquireResponse\" was deleted"), "{noticed}");

    fs::write(&file, whole + "message careless_name {}\n").unwrap();
    let noticed = complaints(folder.path(), &["lint"]).await;
    assert!(noticed.contains("\"careless_name\" should be PascalCase"), "{noticed}");
}
