//! The programs of docs/fencing.md: each works, and the page shows the code that is tested.

use std::fs;

use crate::support::tools;

const FOLDER: &str = "docs/fencing";
const PROGRAMS: [&str; 3] = ["mongodb.py", "sql.py", "object_store.py"];

/// Runs one of the programs. Each tries its write with the fencing condition and without it.
async fn fences(program: &str, argument: Option<&str>) {
    let folder = tools::root().join(FOLDER);
    let mut python = tools::python(&folder.join("requirements.txt")).unwrap();
    python.arg(folder.join(program)).args(argument);
    let output = tools::run(python).await;
    let text = tools::text(&output);
    assert!(output.status.success() && text.contains("the stale write is refused"), "{text}");
}

#[tokio::test]
async fn a_write_to_mongodb_is_fenced() {
    fences("mongodb.py", Some(throwaway_mongodb::shared().await.unwrap())).await;
}

#[tokio::test]
async fn a_row_of_an_sql_database_is_fenced() {
    fences("sql.py", None).await;
}

#[tokio::test]
async fn an_object_of_an_s3_store_is_fenced() {
    fences("object_store.py", None).await;
}

#[test]
fn the_page_about_fencing_shows_the_programs_that_are_run() {
    let read = |name: &str| fs::read_to_string(tools::root().join(name)).unwrap();
    let page = read("docs/fencing.md");
    let programs = PROGRAMS.map(|program| read(&format!("{FOLDER}/{program}")));
    let shown: Vec<&str> =
        page.split("```python\n").skip(1).map(|block| block.split("```").next().unwrap()).collect();
    assert_eq!(shown.len(), PROGRAMS.len());
    for (block, program) in shown.iter().zip(programs) {
        assert!(program.contains(block), "not in the program:\n{block}");
    }
}
