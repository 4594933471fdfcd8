import threading

from moon.runtime.trt.log import Log


def test_all_who_listen_hear_every_thread() -> None:
    log = Log()
    log.say(1, "nobody listens")
    with log.collect() as outer:
        with log.collect() as inner:
            thread = threading.Thread(target=log.say, args=(2, "a warning"))
            thread.start()
            thread.join()
        log.say(0, "worse In build at /_src/a/b.cpp:12 (cudaError 35: no driver)")
    log.say(1, "nobody again")
    assert [one.text for one in inner] == ["a warning"] and inner[0].level == "warning"
    assert len(outer) == 2
    assert log.errors(outer) == ["worse (cudaError 35: no driver)"]


def test_an_unknown_severity_is_the_least() -> None:
    log = Log()
    with log.collect() as heard:
        log.say(99, "x")
    assert heard[0].level == "verbose"
